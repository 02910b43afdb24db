"""Training loops of other libraries, measured; each module needs the library that it is named after."""
