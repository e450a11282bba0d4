"""What all methods share, each thing once; it knows no method."""
