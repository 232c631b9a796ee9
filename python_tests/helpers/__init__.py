"""What several tests build on: references, small networks, backends, programs for processes of their own."""
