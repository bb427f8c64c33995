"""Many rows laid out in one, with every beginning that rows share held once."""
