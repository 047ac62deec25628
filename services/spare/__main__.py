"""`python -m services.spare`: an instance that starts without a role."""

from shared.instance.start import main

if __name__ == "__main__":
    main("spare")
