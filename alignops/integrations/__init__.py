"""What connects alignops to other libraries; each module imports the library that it is about."""
