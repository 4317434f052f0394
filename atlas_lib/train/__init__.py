"""What notebook 03 needs: callbacks, the hub, the model card, memory, adapters, tracking."""
