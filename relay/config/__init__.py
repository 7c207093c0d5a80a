"""The configuration: what it may say, what it says, and what is wrong with it.

The rest of the program takes `Config` and its parts from `config.model` and knows neither YAML nor where secrets come from.
"""
