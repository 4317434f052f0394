"""The data, tokenizer and tiny model that the offline overlay uses in place of the hub's."""
