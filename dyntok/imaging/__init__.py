"""Image files of every accepted format to upright 8-bit RGB, whatever their metadata say and however other libraries are set."""
