"""What notebooks and tests look and check with. The steps themselves never import this package.

`cost` counts FLOPs and bytes, `compare` judges results, `viz` draws. Import the module you need: only `viz` loads
matplotlib and ipywidgets.
"""
