"""Audit a loss mask: the command of atlas_lib/loss_mask/command.py."""

from atlas_lib.loss_mask.command import main

if __name__ == "__main__":
    main()
