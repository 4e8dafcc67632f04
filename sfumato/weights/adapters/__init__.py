"""Adapters: files of small changes to a model's weights, in every spelling of the field; read, worn, written, made."""
