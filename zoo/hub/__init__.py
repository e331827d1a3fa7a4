"""Where models come from: bundled, a folder, the Hugging Face hub. No torch."""
