"""`python -m services.prefill`: an instance that starts in the prefill role."""

from shared.instance.start import main

if __name__ == "__main__":
    main("prefill")
