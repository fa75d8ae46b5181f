"""`python -m fedms`: the command line, where the script `fedms` is not on the path."""
from fedms.cli import main

if __name__ == "__main__":
    main()
