"""Shows a model on a page in the browser: media, a slider per budget, answers, and what each soft token covers."""
