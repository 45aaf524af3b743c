"""The trained weights: attached, saved, loaded, and described for the Hub."""
