from allocator.main import main

main()
