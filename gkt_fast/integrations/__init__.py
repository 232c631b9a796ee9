"""GKT in other people's training loops: one module for each library, imported by its name and only when wanted.

`gkt_fast.integrations.timm`, `.huggingface`, `.lightning`, `.accelerate`. Install the libraries by
`pip install "gkt_fast[integrations]"`.
"""
