"""What notebook 04 alone needs: decoding, responses, IFEval, paired statistics."""
