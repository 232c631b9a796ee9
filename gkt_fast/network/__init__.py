"""What is known of a model: its residual blocks, the order of its calls, costs, noise; how calls are intercepted."""
