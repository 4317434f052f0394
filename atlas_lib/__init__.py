"""Atlas: QLoRA SFT of a pretrained model, with a verified loss mask and honest statistics."""

__version__ = "0.1.0"
