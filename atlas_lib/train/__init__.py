"""What notebook 03 needs: callbacks, hub, loss, model card, memory, adapters, tracking."""
