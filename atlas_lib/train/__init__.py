"""What notebook 03 needs: adapters, callbacks, hub, loss, memory, card, throughput, tracking."""
