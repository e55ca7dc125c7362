"""Finetuning of bypass networks on a frozen decoder, in windows of tokens, in closed form."""
