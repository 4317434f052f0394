"""What notebook 01 needs: the training subset, checked."""
