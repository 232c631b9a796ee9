"""A training run from its flags: what `train` does."""

from __future__ import annotations

import argparse

import torch

from ..data import load_data
from ..distributed import is_distributed, rank, torchrun_process_group
from ..training.schedules import LinearWarmup
from ..training.trainer import GKTTrainer
from ..training.validation import named_subnet
from .arguments import chosen_device
from .initial_weights import load_initial_weights
from .recipe import (
    build_config,
    build_criterion,
    build_loaders,
    build_loggers,
    build_model,
    build_optimizer,
    build_scheduler,
    check_images,
    check_requirements,
    describe,
    synchronized,
)
from .resume import RunRecord, checkpoint_to_resume

__all__ = ["train"]


def train(args: argparse.Namespace) -> None:
    """Trains and evaluates a network as the flags say, as one of several processes under torchrun."""
    check_requirements(args)
    with torchrun_process_group(chosen_device(args), args.timeout) as device:
        _train(argparse.Namespace(**vars(args) | {"device": str(device)}), args)


def _train(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Trains in this process.

    Args:
        args: the flags, with this process's own device.
        given: the flags as they were given, for `args.yaml`.
    """
    torch.manual_seed(args.seed)
    data = load_data(
        args.data,
        args.image_size,
        args.train_images,
        train_crop=args.train_crop,
        augment=args.augment,
        random_erasing=args.random_erasing,
    )
    model = build_model(args.model, data)
    check_images(args.model, model, data)
    anew = load_initial_weights(args, data, model)
    if anew:
        _print(f"Start anew, for other classes: {', '.join(anew)}")
    model = synchronized(args, model)
    optimizer = build_optimizer(args, model)
    config = build_config(args, data)
    train_loader, val_loader, calibration_loader = build_loaders(args, data, config)
    steps_per_epoch = -(-len(train_loader) // args.accumulate)
    output = None if args.output is None else args.output / (args.experiment or f"{args.model}-{args.method}")
    checkpoint = checkpoint_to_resume(args, output)
    record = RunRecord(given, config, output, checkpoint, describe(args, data, config, model))
    criterion = build_criterion(args, config)
    trainer = GKTTrainer(
        model,
        optimizer,
        config if criterion is None else config.replace(label_smoothing=0.0),
        criterion=criterion,
        scheduler=build_scheduler(args, optimizer),
        device=args.device,
        amp=args.amp_dtype if args.amp else None,
        channels_last=args.channels_last,
        accumulate=args.accumulate,
        clip_grad_norm=args.clip_grad_norm,
        ema_decay=args.ema_decay,
        kd_schedule=LinearWarmup(args.kd_warmup_epochs * steps_per_epoch) if args.kd_warmup_epochs else None,
        skip_nonfinite=args.skip_nonfinite,
        compile_blocks=args.compile_blocks,
        deterministic=args.deterministic,
    )
    # Before training, so that a slip doesn't show up only after it.
    subnets = [
        named_subnet("evaluate_depths", depths, trainer.gkt.stages) for depths in args.evaluate_depths or ()
    ]
    if is_distributed():
        torch.manual_seed(args.seed + rank())  # the ranks' noise differs
    try:
        trainer.fit(
            train_loader,
            epochs=args.epochs,
            val_loader=val_loader,
            val_depths=args.track_depths or (),
            calibration_loader=calibration_loader,
            calibrate_full=args.calibrate_full,
            output_dir=output,
            resume=False if checkpoint is None else checkpoint,
            log_interval=args.log_interval,
            loggers=build_loggers(args, output),
            callbacks=[record],
        )
    except KeyboardInterrupt:
        if output is not None:
            _print(f"Interrupted; the same command goes on from {output / 'last.pt'}")
        raise
    if record.finished and not subnets:
        return
    calibration = {"calibration_loader": calibration_loader} if args.calibrate_full else {}
    result = trainer.evaluate(val_loader, **calibration)
    _print(f"Test: accuracy {100 * result.accuracy:.2f} % loss {result.loss:.4f} ({result.samples} images)")
    if trainer.ema_model is not None:
        result = trainer.evaluate(val_loader, ema=True, **calibration)
        _print(f"Test of averaged weights: accuracy {100 * result.accuracy:.2f} % loss {result.loss:.4f}")
    for subnet in subnets:
        result = trainer.evaluate(val_loader, subnet, calibration_loader=calibration_loader)
        _print(f"Test of depths {subnet}: accuracy {100 * result.accuracy:.2f} %")
    if output is not None:
        _print(f"Written to {output}")


def _print(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)
