"""DSA inside other libraries' models. Each module here needs the library of its name; nothing else imports it."""
