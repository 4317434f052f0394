"""Atlas: QLoRA SFT of a pretrained model, with a proven loss mask and honest statistics."""

__version__ = "0.1.0"
