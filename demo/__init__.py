"""The tiny models that ship with the product: their language, their training and their evaluation."""
