"""An app that shows what turntrace does, and the replay of recorded conversations."""
