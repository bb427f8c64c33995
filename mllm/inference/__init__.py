"""Questions about media answered at a budget."""
