"""How the tiny LLaVA in data/tiny_llava was made."""
