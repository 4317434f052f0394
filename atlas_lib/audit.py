"""Audit a loss mask: the command of atlas_lib/loss_mask/audit.py."""

from atlas_lib.loss_mask.audit import main

if __name__ == "__main__":
    main()
