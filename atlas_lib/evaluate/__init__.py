"""What notebook 04 needs: decoding, responses, IFEval, paired statistics."""
