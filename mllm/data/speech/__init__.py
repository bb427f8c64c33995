"""Speech clips to samples: lists, folders and corpora."""
