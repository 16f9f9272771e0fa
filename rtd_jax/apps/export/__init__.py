"""A student to share: its folder with a model card and the licence of its teacher, here or on the Hugging Face hub."""
