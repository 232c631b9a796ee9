"""What is done with a trained network: evaluation of subnets, extraction, export."""
