"""The command `pdserve`: everything on one machine, and a look at what runs."""
