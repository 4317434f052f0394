"""Score and compare responses or models: the command of atlas_lib/evaluate/command.py."""

from atlas_lib.evaluate.command import main

if __name__ == "__main__":
    main()
