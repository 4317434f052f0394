"""What notebook 03 alone needs: callbacks, the hub, the model card, tracking."""
