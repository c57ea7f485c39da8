"""`make bench`: how fast the broker is, and how fast is what one would write instead of it."""
