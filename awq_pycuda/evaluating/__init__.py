"""What the evaluate command is made of: recipes, the layers that they quantize, and what that does to a whole model."""
