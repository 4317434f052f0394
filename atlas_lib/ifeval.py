"""Score and compare responses: the command of atlas_lib/evaluate/ifeval.py."""

from atlas_lib.evaluate.ifeval import main

if __name__ == "__main__":
    main()
