"""Which tokens the loss sees: found in independent ways, audited for every row."""
