"""Take the evaluated model away: merged safetensors or GGUF, proved to be the same model."""
