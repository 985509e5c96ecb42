"""What Sphinx makes of the sources that `python -m notebooks.maintain.site` writes; not to be run by itself."""

import os

project = "DeepSeek Sparse Attention: the course"
author = "the project's authors"
extensions = ["myst_nb"]

nb_execution_mode = "off"  # the stored outputs are compared by `make test`
nb_merge_streams = True
nb_render_error_lexer = "text"
nb_code_prompt_show = "Made your guess? Open the {type}"
nb_code_prompt_hide = "Close the {type}"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4

# No address of another host: MathJax is copied into the site, the theme brings its own fonts.
mathjax_path = "mathjax.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would load parts that are not here

html_theme = "sphinx_book_theme"
html_title = "DeepSeek Sparse Attention"
html_static_path = ["static"]
html_css_files = ["course.css"]
html_show_copyright = False
html_use_index = False
html_last_updated_fmt = None
html_theme_options = {
    "path_to_docs": "notebooks",
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
    "secondary_sidebar_items": [],  # its room goes to code of 120 columns
}
if repository := os.environ["SITE_REPOSITORY"]:
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": os.environ["SITE_BRANCH"],
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }
