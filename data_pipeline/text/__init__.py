"""Text tokenizers behind one small interface: sentencepiece models and Hugging Face tokenizer.json files."""
