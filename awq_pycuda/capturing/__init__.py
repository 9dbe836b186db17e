"""What the capture command is made of: a model, a text, the layers that see its tokens, their inputs in a file."""
