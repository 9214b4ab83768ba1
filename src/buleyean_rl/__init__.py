"""Fine-tune an open language model from rejections alone, and chat with the result."""

__version__ = "0.1.0"
