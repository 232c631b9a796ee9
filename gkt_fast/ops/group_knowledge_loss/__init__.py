"""Group soft labels, Kullback-Leibler divergence, cross entropy and their gradient in one pass over the logits."""

from .class_indices import wrong_class_index
from .op import group_knowledge_loss
from .options import LossOptions, lists_options
from .reference import GroupKnowledge, Past, group_knowledge_loss_reference

__all__ = [
    "GroupKnowledge",
    "LossOptions",
    "Past",
    "group_knowledge_loss",
    "group_knowledge_loss_reference",
    "lists_options",
    "wrong_class_index",
]
