"""`import ctk` as inside Slicer, for when this folder is on the path."""

import standins

standins.install()  # puts the real stand-in in this module's place
