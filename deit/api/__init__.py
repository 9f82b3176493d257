"""The Python interface: `deit.train`, `deit.Run` and the other names that `import deit` offers.

The functions that are complete elsewhere (`evaluate`, `export`, ...) are offered as they are. The
table of all names is in deit/__init__.py.
"""
