"""`python -m services.decode`: an instance that starts in the decode role."""

from shared.instance.start import main

if __name__ == "__main__":
    main("decode")
